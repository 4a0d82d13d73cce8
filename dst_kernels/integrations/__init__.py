"""Train masked models with transformers, Lightning and accelerate.

Each module imports its framework, so none is imported before you ask for it:
`from dst_kernels.integrations.transformers import DSTTrainer`.
"""
