"""From shards on disk to filled parameters."""
