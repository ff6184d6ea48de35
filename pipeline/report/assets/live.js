"use strict";
/* Live, plotly comes last, after the page is there. */
Relay.chartsReady();
