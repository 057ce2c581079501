"""Facts without torch: what a call, a machine and a mask are, and what a backend takes."""
