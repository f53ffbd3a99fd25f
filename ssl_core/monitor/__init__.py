"""What is watched while a method trains: signs of collapse, and how well labels follow from features."""
