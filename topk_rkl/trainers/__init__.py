"""The loss in the trainers people use: a module per project, which imports that project and nothing else does."""
