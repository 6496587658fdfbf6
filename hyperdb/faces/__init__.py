"""Pictures of people: reading them, finding faces, cutting them out."""
