"""What a person looks at, installed as `lmtt.viz`; it computes nothing."""
