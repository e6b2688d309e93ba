"""The claims of "Revisiting On-Policy Distillation" (arXiv 2603.25562) and of its critics, measured on two cores."""
