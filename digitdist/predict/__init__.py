"""Pictures that people bring, brought to the form of MNIST's images, for the model of a run.

How a picture is decoded, what counts as ink, and how a digit is scaled and centred may be changed here, each in its file.
"""

from digitdist.predict.mnist_form import mnist_form
from digitdist.predict.picture import list_pictures, open_picture, read_picture

__all__ = ["list_pictures", "mnist_form", "open_picture", "read_picture"]
