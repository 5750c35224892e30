"""Generated from protos/kvrep/_pb/*.proto by `make proto`; committed, never edited."""
