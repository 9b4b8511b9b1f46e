"""Long fine-tuning over data sets: `settings`, `data` (sources), `stream` (examples), `overlap` with evaluation tasks, `recall`;
`learner` (the model), `train` (transformers' Trainer), `run` (one run on one folder), `study` (several learning rates), `page`."""
