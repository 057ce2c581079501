"""What a run decided, as plain data beside a picture, and a configuration made of it again."""
