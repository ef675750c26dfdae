"""What maintainers run: checks of packages and dependencies."""
