"""Secateur's training hooks in other people's trainers: `transformers.Trainer` and Lightning."""
