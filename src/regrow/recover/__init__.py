"""What stands in for what a call does not compute."""
