from coordlib.testing.simulation.campaign import main

raise SystemExit(main())
