"""`halfbyte evaluate`: rows, scored vectors, figures with intervals, one record.

settings    the options, and which protocols mean something for a model
bases       reference and candidates: whose bf16 each candidate is held against
material    data files (or what is built in) -> rows of a protocol
vectors     scored vectors on disk under the digest of everything they depend on
scoring     what is not on disk yet is scored, the reference once, the candidates one by one
figures     vectors -> figures with intervals, buckets, verdicts
effects     two bases -> the 2 x 2 of base and precision
layers      error of the weights themselves, layer by layer
sizes       bytes and bits per weight
worst       the tokens that suffered most, in their context
writing     the record, and what a checkpoint's own card needs of it
run         all of it in order
"""

from halfbyte.evaluator.job.run import evaluate
from halfbyte.evaluator.job.settings import EVALUATION_OPTIONS, Settings

__all__ = ["EVALUATION_OPTIONS", "Settings", "evaluate"]
