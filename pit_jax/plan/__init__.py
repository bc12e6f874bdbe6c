"""What a recipe costs before anything runs: its programs compiled for machines that are not there."""
