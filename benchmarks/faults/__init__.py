"""What becomes of the command line when the machine fails it: one file for each kind of fault."""
