"""`gemsmith reproduce NAME`: a paper's claim shown in small, judged by a test that was chosen before it was run."""
