"""The legal members of the federation."""
