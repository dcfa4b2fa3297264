"""cnnpipe: from images in class folders to a convolutional network that can be trusted."""

__version__ = "0.1.0"
