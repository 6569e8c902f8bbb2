"""What is kept per series, and the rules of its clock."""
