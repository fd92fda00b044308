-- Writes the final record of a task that needs no call, unless another submit of it came first.
--
-- KEYS    1 stream; 2 record
-- ARGV    1 epoch; 2 digest; 3 record JSON; 4 its life in ms; 5 highest schema version that is readable; 6 schema
--         version; 7 distance of the final sequence from the epoch; 8 the epoch to replace, or ''
-- result  kind, epoch, existing record: as of submit.lua
local existing = redis.pcall('GET', KEYS[2])
local kind, epoch = nil, tonumber(ARGV[1])
if existing then kind, epoch = judge(KEYS[1], existing, ARGV[1], ARGV[2], ARGV[8], ARGV[5]) end
if kind then return {kind, ARGV[1], type(existing) == 'table' and '' or existing} end
local head = string.format('%s completed - %.0f %.0f %s\n', ARGV[6], epoch, epoch + tonumber(ARGV[7]), ARGV[2])
redis.call('SET', KEYS[2], head .. ARGV[3], 'PX', ARGV[4])
return {existing and 'again' or 'new', string.format('%.0f', epoch), ''}
