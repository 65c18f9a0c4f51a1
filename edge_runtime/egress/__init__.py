"""What leaves the device: through one door, without what is to stay, and written down."""
