-- Cancels a task that is not finished: takes its entry out, so that nobody starts or finishes it any more.
--
-- KEYS  1 stream; 2 outbox; 3 record; 4 run; 5 hooks
-- ARGV  1 group; 2 epoch; 3 final record; 4 its life in ms; 5 run that says so, without its entry id; 6 its life;
--       7 when the outbox falls due, Unix ms; 8 the task's name in it; 9 '1' if it brought webhooks along
-- returns three: '' where it was cancelled, else the record that stands; the hooks where webhooks joined, else '';
--         the count of calls that may have been paid twice where it was raised, else 0. False where there is no record
local known = redis.pcall('GET', KEYS[3])
if type(known) ~= 'string' then return false end
local state, entry, epoch = string.match(known, '^%d+ (%l+) (%S+) (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or epoch ~= ARGV[2] then return {known, '', 0} end
redis.call('XDEL', KEYS[1], entry)
redis.pcall('XACK', KEYS[1], ARGV[1], entry)
local count = billed_before(known, epoch)
if count <= billed_in(ARGV[3]) then count = 0 end
redis.call('SET', KEYS[3], with_billed(ARGV[3], count), 'PX', ARGV[4])
redis.call('SET', KEYS[4], entry .. ' ' .. ARGV[5], 'PX', ARGV[6])
local joined = string.match(known, '^[^\n]* %+\n') and redis.pcall('GET', KEYS[5])
if type(joined) ~= 'string' then joined = '' end
if joined ~= '' or ARGV[9] == '1' then redis.pcall('ZADD', KEYS[2], ARGV[7], ARGV[8]) end
return {'', joined, count}
