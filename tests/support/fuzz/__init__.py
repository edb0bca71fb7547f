"""Bad input by the thousand: mutations of good files, what is done with each file, and campaigns that count."""
