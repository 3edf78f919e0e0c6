"""What a loss averages over: counting rules, how they are measured, auxiliary parts."""
