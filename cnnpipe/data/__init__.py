"""The data: where images come from, how they are decoded, resized, stored and split."""
