"""Preference data: schema, readers, folds, views, batches and sources; TensorFlow only in `seqio_*`."""
