"""Raw bytes -> rows -> parquet shards and a manifest, and back into tensors."""
