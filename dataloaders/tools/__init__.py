"""What the commands on data sets do: validate, re-encode, index, measure."""
