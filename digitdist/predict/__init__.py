"""What is in pictures that people bring: each brought to the form of a run's images, and predicted by its model.

How a picture is decoded, what counts as ink, and how a digit is scaled and centred is in `digitdist.data`.
"""

from digitdist.predict.predicting import predict

__all__ = ["predict"]
