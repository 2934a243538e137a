"""What changed in a candidate, apart from its score: which areas of the model were left alone, and proof of it.

untouched   towers, projector, embeddings, head: tensor by tensor equal to the reference's, or not
kept        a measurement in a JSON file under the digest of what it depends on
"""
