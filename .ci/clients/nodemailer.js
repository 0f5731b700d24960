// Nodemailer.   nodemailer.js MODE PORT CAFILE USER PASSWORD FROM TO <MAIL
const fs = require('fs');
const nodemailer = require('nodemailer');

const [mode, port, cafile, user, pass, from, to] = process.argv.slice(2);
const transport = nodemailer.createTransport({
  host: 'localhost',
  port: Number(port),
  secure: mode === 'tls',
  requireTLS: mode === 'starttls',
  ignoreTLS: mode === 'plain',
  auth: { user, pass },
  tls: { ca: fs.readFileSync(cafile) },
});
const raw = fs.readFileSync(0);
transport.sendMail({ envelope: { from, to }, raw }).catch((error) => {
  console.error(error);
  process.exit(1);
});
