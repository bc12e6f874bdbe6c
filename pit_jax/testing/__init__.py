"""What tests of this project, and of extensions of it, are made of."""
