"""Cases: finding, reading and writing of their files."""
