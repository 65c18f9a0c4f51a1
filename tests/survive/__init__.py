"""Power cuts, kills and disks that fail: what is left is whole, and goes on."""
