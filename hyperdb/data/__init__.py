"""What trainings read: rendered people, aligned photos, prompts, stores of per-identity fits."""

NOT_CONTENT = ("out", "workers")  # settings of `hyperdb render_heads` that change no byte of a shard
