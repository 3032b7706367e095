"""What stands on the public surface: measuring, searching, calibrating, training, the command line."""
