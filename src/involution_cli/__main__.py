from involution_cli import main

main()
