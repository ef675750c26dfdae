"""What is measured of models while and after they train, and the tests that experiments put to it."""
