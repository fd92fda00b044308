-- Cancels a task that is not finished: takes its entry out, so that nobody starts or finishes it any more.
--
-- KEYS  1 stream; 2 record; 3 run
-- ARGV  1 group; 2 generation; 3 final record; 4 its life in ms; 5 run that says so, without its entry id; 6 its life
-- returns '' where it was cancelled; else the record that stands, or false where there is none
local known = redis.call('GET', KEYS[2])
if not known then return false end
local state, entry, generation = string.match(known, '^%d+ (%l+) (%S+) (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or generation ~= ARGV[2] then return known end
redis.call('XDEL', KEYS[1], entry)
redis.pcall('XACK', KEYS[1], ARGV[1], entry)
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
redis.call('SET', KEYS[3], entry .. ' ' .. ARGV[5], 'PX', ARGV[6])
return ''
