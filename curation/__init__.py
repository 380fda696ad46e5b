"""Raw pools of images and texts in, balanced webdataset shards out."""
