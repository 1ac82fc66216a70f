"""What the benchmark compares with: a SavedModel behind KServe's Python server, as its documentation shows it.

Run by KServe's own environment (benchmark_kserve.txt), which has nothing of this project's: FOLDER PORT.
"""

import logging
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import kserve
import numpy as np
import tensorflow as tf


class SavedModel(kserve.Model):
    """The model `m`: row format in, row format out."""

    def __init__(self, folder):
        super().__init__("m")
        self.signature = tf.saved_model.load(folder).signatures["serving_default"]
        (self.alias,) = self.signature.structured_input_signature[1]
        self.ready = True

    def predict(self, payload, headers=None):
        """Answer {"instances": ...} with {"predictions": ...}."""
        image = tf.constant(np.asarray(payload["instances"], np.float32))
        (answer,) = self.signature(**{self.alias: image}).values()
        return {"predictions": answer.numpy().tolist()}


if __name__ == "__main__":
    logging.disable(logging.INFO)  # it writes several lines for each request, which would slow it down
    server = kserve.ModelServer(http_port=int(sys.argv[2]), enable_grpc=False, workers=1, enable_latency_logging=False)
    server.start([SavedModel(sys.argv[1])])
