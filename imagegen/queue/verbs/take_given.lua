-- Moves entries that are pending for one consumer to another one.
--
-- KEYS    1 stream
-- ARGV    1 group; 2 consumer that gives them; 3 consumer that takes them; 4 and 5 the first and the last entry id;
--         then the entry ids in order
-- result  the entries that were still the giver's, as XCLAIM returns them
local stream, group, giver, taker, ids = KEYS[1], ARGV[1], ARGV[2], ARGV[3], {}
local list, owned_set = owned(stream, group, giver, ARGV[4], ARGV[5])
if not list then return {} end
for i = 6, #ARGV do
  if owned_set[ARGV[i]] or owns(stream, group, giver, ARGV[i], list) then ids[#ids + 1] = ARGV[i] end
end
if #ids == 0 then return {} end
return redis.call('XCLAIM', stream, group, taker, 0, unpack(ids))
