"""What becomes of commands whose input somebody made to fool them: every reader, on small files that are changed."""
