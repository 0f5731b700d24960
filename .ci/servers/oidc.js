// A token server on loopback: oidc-provider, and what a test needs to see and
// to change in it.
//
//     node oidc.js FILE           its settings, see signin.py
//
//     GET  /admin                 {"requests": [...], "secrets": [...]}
//     POST /admin                 a JSON object of rules that change
//     POST /admin/expire          the access tokens die, the sign-ins live
//     POST /admin/revoke          the sign-ins die, as if the person took back
//                                 the consent
'use strict';
const crypto = require('node:crypto');
const fs = require('node:fs');
const http = require('node:http');
const https = require('node:https');
const { setTimeout: sleep } = require('node:timers/promises');
const { pathToFileURL } = require('node:url');

const settings = JSON.parse(fs.readFileSync(process.argv[2]));
const NATIVE = {
    application_type: 'native',
    grant_types: ['authorization_code', 'refresh_token',
        'urn:ietf:params:oauth:grant-type:device_code'],
    response_types: ['code'],
    redirect_uris: ['http://127.0.0.1/', 'http://localhost'],
};
const SECRETS = ['access_token', 'refresh_token', 'device_code', 'code',
    'code_verifier', 'client_secret', 'id_token'];

const rules = {
    ttl: 3600,      // seconds that an access token lives
    bits: 256,      // of randomness in it: its length
    interval: 1,    // seconds between two polls; null: not said
    before: 0,      // ms that a token request waits before it is looked at
    after: 0,       // ms that the answer waits after all is decided
};
const requests = [];        // to the token address, oldest first
const secrets = new Set();  // all that nobody else may see

// The adapter of oidc-provider's own forgets all beyond 1000 entries.
const entries = new Map();

class Memory {
    constructor(model) { this.model = model; }

    key(id) { return `${this.model}:${id}`; }

    async upsert(id, payload) {
        entries.set(this.key(id), { model: this.model, ...payload });
    }

    async find(id) { return entries.get(this.key(id)); }

    async findBy(name, value) {
        return [...entries.values()].find((entry) =>
            entry.model === this.model && entry[name] === value);
    }

    async findByUid(uid) { return this.findBy('uid', uid); }

    async findByUserCode(code) { return this.findBy('userCode', code); }

    async consume(id) { (await this.find(id)).consumed = now(); }

    async destroy(id) { entries.delete(this.key(id)); }

    async revokeByGrantId(id) {
        forget((entry) => entry.model === this.model && entry.grantId === id);
    }
}

function forget(condition) {
    for (const [key, entry] of entries) {
        if (condition(entry)) entries.delete(key);
    }
}

function now() { return Date.now() / 1000; }

// Requests are told apart by it; the record itself gives no secret away.
function fingerprint(secret) {
    return secret && crypto.createHash('sha256').update(secret)
        .digest('hex').slice(0, 16);
}

async function record(ctx, next) {
    const arrived = now();
    if (ctx.path === '/token' && rules.before) await sleep(rules.before);
    await next();
    const asked = ctx.oidc?.params ?? {}, answer = ctx.body ?? {};
    for (const name of SECRETS) {
        if (asked[name]) secrets.add(asked[name]);
        if (answer[name]) secrets.add(answer[name]);
    }
    for (const [, code] of (ctx.response.get('location') || '')
        .matchAll(/[?&]code=([^&]+)/g)) secrets.add(code);
    if (ctx.path === '/device/auth' && rules.interval !== null) {
        answer.interval = rules.interval;
    }
    if (ctx.path !== '/token') return;
    const entry = {
        arrived, client: asked.client_id, grant: asked.grant_type,
        scope: asked.scope, error: answer.error,
        why: ctx.refusal,
        presented: fingerprint(asked.refresh_token),
        issued: fingerprint(answer.refresh_token),
    };
    requests.push(entry);
    await sleep(rules.after);
    ctx.res.on('finish', () => { entry.answered = now(); });
}

async function administer(ctx, next) {
    if (!ctx.path.startsWith('/admin')) return next();
    ctx.body = { requests, secrets: [...secrets] };
    if (ctx.method !== 'POST') return undefined;
    let text = '';
    for await (const chunk of ctx.req) text += chunk;
    Object.assign(rules, JSON.parse(text || '{}'));
    const tokens = ['AccessToken', 'ClientCredentials'];
    if (ctx.path === '/admin/expire') {
        forget((entry) => tokens.includes(entry.model));
    } else if (ctx.path === '/admin/revoke') {
        forget((entry) => entry.grantId || entry.model === 'Grant');
    }
    ctx.body = {};
    return undefined;
}

function configuration() {
    return {
        adapter: Memory,
        clients: [
            {
                ...NATIVE, client_id: 'box',
                token_endpoint_auth_method: 'none',
            },
            {
                ...NATIVE, client_id: 'desktop',
                client_secret: settings.secret,
                token_endpoint_auth_method: 'client_secret_post',
            },
            {
                client_id: 'app', client_secret: settings.secret,
                token_endpoint_auth_method: 'client_secret_post',
                grant_types: ['client_credentials'],
                redirect_uris: [], response_types: [],
            },
            {
                client_id: 'dovecot', client_secret: 'introspection',
                grant_types: [], redirect_uris: [], response_types: [],
            },
        ],
        cookies: { keys: [crypto.randomBytes(16).toString('hex')] },
        scopes: ['offline_access', 'smtp.send'],
        features: {
            clientCredentials: { enabled: true },
            devInteractions: { enabled: true },
            deviceFlow: { enabled: true },
            introspection: { enabled: true, allowedPolicy: () => true },
        },
        formats: { bitsOfOpaqueRandomness: (ctx, token) => (
            token.kind === 'AccessToken' ? rules.bits : 256) },
        findAccount: (ctx, id) => ({
            accountId: id, claims: () => ({ sub: id }),
        }),
        extraTokenClaims: (ctx, token) => ({
            email: token.accountId || settings.mailbox,
        }),
        issueRefreshToken: (ctx, client) =>
            client.grantTypeAllowed('refresh_token'),
        rotateRefreshToken: true,
        pkce: { required: () => true },
        ttl: {
            AccessToken: () => rules.ttl, ClientCredentials: () => rules.ttl,
            DeviceCode: 120, Grant: 86400, Interaction: 600,
            RefreshToken: 86400, Session: 86400, IdToken: 3600,
        },
    };
}

async function main() {
    // NODE_PATH counts for require only, and the package is no CommonJS.
    const module = pathToFileURL(require.resolve('oidc-provider'));
    const { Provider } = await import(module);
    const provider = new Provider(
        `http://127.0.0.1:${settings.port}`, configuration());
    provider.use(administer);
    provider.use(record);
    // The answer itself says as little as it may.
    provider.on('grant.error', (ctx, error) => {
        ctx.refusal = error.error_detail || error.error_description;
    });
    provider.on('server_error', (ctx, error) => console.error(error));
    http.createServer(provider.callback())
        .listen(settings.port, '127.0.0.1');
    const pem = fs.readFileSync(settings.pem);
    https.createServer({ key: pem, cert: pem }, provider.callback())
        .listen(settings.tlsport, '127.0.0.1');
}

main();
