"""Pure data: positions, records, segments, configurations and their byte forms. No I/O."""
