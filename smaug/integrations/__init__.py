"""smaug's ops inside of other libraries' models; each file imports its library when it is called, not before."""
