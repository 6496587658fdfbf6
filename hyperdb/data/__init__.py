"""What trainings read: rendered people, aligned photos, prompts, stores of per-identity fits."""
