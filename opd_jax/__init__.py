"""On-policy distillation as one loop: sample with the student, label with the teacher, supervise every step, update."""

__version__ = "0.1.0"
