"""What every stage stands on: seeds, files, journals, optimisers, provenance.

Knows nothing of faces or diffusion.
"""
