"""What a stopped training leaves and a resumed one finds."""
