"""Text before it becomes ids: documents.py reads files, parallel.py works on blocks of text in processes, progress.py
draws the progress bar. Below both base/tokenizer/ and base/data/, and imports neither.
"""
